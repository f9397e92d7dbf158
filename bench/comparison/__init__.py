"""Baton beside its peers: who is started how, what is asked of all of them, and the page that says who won what."""
