"""Files, progress, Ctrl-C and plug-ins: whole-file writing, arrays on disk, what a long run prints and how it stops."""
