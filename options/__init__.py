"""Options, layers and models as data, without torch; parser, YAML and checks."""
