"""What counts as one signal to end. What a server does then is its own business."""

# A signal that comes so soon after another is that one again: timeout(1) sends each twice.
REPEAT_S = 0.2
