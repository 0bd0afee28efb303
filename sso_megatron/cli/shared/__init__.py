"""What several commands share: pages, and Megatron in a process that trains nothing."""
