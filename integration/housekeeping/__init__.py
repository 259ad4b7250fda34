"""What is done with the images of real processes without the processes."""
