"""An adapter as the device's engines read it; each format in its own file."""
