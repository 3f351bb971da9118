"""Small models, short runs and published formats that several folders of tests share."""
