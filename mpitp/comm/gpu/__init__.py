"""GPUs: which one a rank has, and what carries its sums. Imported when a group is made on device "gpu"."""
