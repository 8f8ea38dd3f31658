"""What all commands share: checks of options, provenance of results, and runs of many cells."""
