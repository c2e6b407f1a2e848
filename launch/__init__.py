"""The command line and what it starts: verbs (`cli`), plans, runs, jobs on other machines, reports, the doctor."""
