"""Images from disk to `uint8` batches; nothing here touches a JAX device."""
