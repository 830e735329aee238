"""Methods for the tiny models of the comparisons."""

QUERY = {"name": "lora", "target_modules": ["query", "value"]}
Q_PROJ = {"name": "lora", "target_modules": ["q_proj", "v_proj"]}
