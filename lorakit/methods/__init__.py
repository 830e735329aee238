"""The adaptation methods, one file each, behind one interface (lorakit.attach.method.Method)."""
