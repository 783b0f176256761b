"""What only a mesh of several devices needs: bringing tokens to experts."""
