"""Parts that all our HTML pages share: base template, stylesheet, sortable tables."""
