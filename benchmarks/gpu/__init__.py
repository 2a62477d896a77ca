"""What needs a GPU or its machine code: one command, its plan, sanitizers, SASS."""
