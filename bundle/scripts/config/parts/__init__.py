"""The sections of the experiment, a file each; `volumen.config.sections` collects them."""
