"""The process and the machine that it runs on: CPU in place of a GPU, threads, secrets, warnings, how commands end."""
