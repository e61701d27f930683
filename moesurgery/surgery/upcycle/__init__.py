"""The parts of `upcycle`: dense models taken apart, experts, routers, prompts, the proof."""
