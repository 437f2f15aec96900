"""TorchCFM's own tests, with its sampler and matchers swapped for those of sbot."""
