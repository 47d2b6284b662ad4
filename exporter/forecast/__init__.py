"""What a build would do, before it is done: decisions and bytes by the passes themselves, time and memory by rule."""
