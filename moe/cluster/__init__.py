"""Several processes as one run: finding each other, agreeing, and saying who does not."""
