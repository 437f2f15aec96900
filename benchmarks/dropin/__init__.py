"""Every call that sbot stands in for, on the original and on sbot: seconds, the error that each reached, what failed."""
