"""Draw camera images, boxes and BEV maps as pictures and videos."""
