"""The engine's cost, measured and fitted, and the real router in virtual time in front of engines of that cost."""
