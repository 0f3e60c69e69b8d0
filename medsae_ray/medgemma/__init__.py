"""The vision-language model that names neurons and puts the names to the test."""
