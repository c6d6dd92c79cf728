"""Programs for those who work on freezekit; no package contains them."""
