"""The files that data-driven edits read: statistics of experts, group fits, repairs."""
