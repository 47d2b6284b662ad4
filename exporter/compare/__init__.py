"""Two models or builds side by side: what differs in graphs, numbers and measurements."""
