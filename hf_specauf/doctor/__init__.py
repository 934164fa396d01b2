"""What makes a drafter slow, found before it is trained and before it is published. The command is
`specauf doctor`, in `command.py`."""
