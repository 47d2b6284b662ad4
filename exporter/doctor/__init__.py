"""What this machine can do: what is installed, what there is of hardware, and whether both fit together."""
