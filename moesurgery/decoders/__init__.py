"""What turns a dense decoder into a mixture of experts and back."""
