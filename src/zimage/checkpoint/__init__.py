"""From a name to components in memory: hub ids and folders, read without trusting anything in them."""
