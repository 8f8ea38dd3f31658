"""Files and progress: whole-file writing, arrays on disk, and what a long run prints."""
