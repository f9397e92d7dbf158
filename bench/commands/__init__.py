"""``baton bench ...``: arguments, output and exit codes, one module a verb. Imports what is heavy inside functions."""
