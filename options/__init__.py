"""Every option, layer and model as data, without torch; the parser and YAML; checks; the machine."""
