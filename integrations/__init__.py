"""Drop-in parts for other frameworks. Each needs only its own framework."""
