"""What looks after runs and machines from outside."""
