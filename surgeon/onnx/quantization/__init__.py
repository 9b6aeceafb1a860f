"""int8 and fp16 files: how they are written, what stays float, what each layer loses."""
