"""Small models, short runs and published formats shared by several test packages."""
