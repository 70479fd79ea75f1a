"""Dense maths on plain arrays, forward and backward side by side. Knows no ranks."""
