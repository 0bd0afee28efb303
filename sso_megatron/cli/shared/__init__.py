"""Code that several commands share: errors, pages, and Megatron in a process that trains nothing."""
