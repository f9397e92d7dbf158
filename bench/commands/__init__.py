"""``baton bench ...``: arguments, output and exit codes, one module a verb. Imports heavy things late."""
