"""Text-to-image: adapters on the denoiser of a diffusion pipeline, trained on images with captions."""
