"""What is measured and fitted on text: statistics, repairs, ablations."""
