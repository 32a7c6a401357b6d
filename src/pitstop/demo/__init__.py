"""The demo: two recipes, the builders of their data, and the story told with the commands a user has."""
