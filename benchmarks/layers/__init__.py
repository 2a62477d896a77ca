"""Single layers on this machine's CPU or GPU, beside torch's own."""
