"""Sends planned requests at their times and records what comes back: targets, the sender, the golden server."""
