"""What all commands share: options and their checks, printing, Ctrl-C, provenance of results, runs of many cells."""
