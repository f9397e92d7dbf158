"""The ``baton`` command: one file per verb. Parses, prints, turns errors into exit codes; decides nothing else."""
