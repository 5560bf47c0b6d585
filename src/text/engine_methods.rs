//! The methods of an encoder in use, written once.

/// The methods that all encoders in use have, for a type with an [`Engine`] in its field `engine`.
macro_rules! engine_methods {
    () => {
        /// Width of an embedding, E.
        #[must_use]
        pub fn width(&self) -> usize {
            self.engine.width()
        }

        /// The tokenizer.
        #[must_use]
        pub fn tokenizer(&self) -> &dyn Tokenizer {
            self.engine.tokenizer()
        }

        /// The device.
        #[must_use]
        pub fn gpu(&self) -> &Gpu {
            self.engine.gpu()
        }

        /// Whether embeddings are divided by their norm.
        #[must_use]
        pub fn normalizes(&self) -> bool {
            self.engine.normalizes()
        }

        /// The embeddings of texts, in their order. What does not fit the encoder's length is cut: [`Embeddings::truncated`].
        ///
        /// Texts are tokenised on all cores while the device works on earlier ones. An empty text is encoded like any other.
        ///
        /// # Errors
        /// [`Error::Tokenizer`] naming the text; [`Error::Data`] naming the text for an embedding that is not finite; [`Error::OutOfMemory`],
        /// [`Error::DeviceLost`]; what compiling returns.
        pub fn encode(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Embeddings> {
            self.engine.encode(texts)
        }

        /// As [`encode`](Self::encode), without blocking while the device works. Tokenising and compiling still block, the former for some
        /// milliseconds at a time.
        ///
        /// # Errors
        /// As [`encode`](Self::encode).
        pub async fn encode_async(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Embeddings> {
            self.engine.encode_async(texts).await
        }

        /// The embeddings of texts that are tokenised already, with the tokens that start and end them.
        ///
        /// What does not fit the encoder's length is cut at the end. A text that is cut so loses the token that ends it, such as `[SEP]`, which
        /// [`encode`](Self::encode) keeps: its tokenizer cuts the words and then adds the token.
        ///
        /// # Errors
        /// [`Error::Data`] for an id outside the vocabulary; as [`encode`](Self::encode).
        pub fn encode_ids(&self, texts: &[impl AsRef<[u32]>]) -> Result<Embeddings> {
            self.engine.encode_ids(texts)
        }

        /// As [`encode`](Self::encode), into the rows of a tensor [n, E] in f32 or f16, for everything submitted from now on. Returns what was cut.
        ///
        /// # Errors
        /// [`Error::Layout`] for a tensor of another shape or type; as [`encode`](Self::encode). The tensor is then unchanged.
        pub fn encode_to(
            &self,
            texts: &[impl AsRef<str> + Sync],
            tensor: &Tensor,
        ) -> Result<Vec<Truncation>> {
            self.engine.encode_to(texts, tensor)
        }

        /// Compiles what calls of up to `texts` texts need, for all lengths, and runs each shape once, so that later calls wait for neither.
        ///
        /// # Errors
        /// What compiling and running return.
        pub fn warm_up(&self, texts: usize) -> Result<()> {
            self.engine.warm_up(texts)
        }

        /// The compiled forward pass for texts of up to so many tokens in a batch that holds `texts` of them, for looking at its plan and
        /// kernels.
        ///
        /// # Errors
        /// What compiling returns.
        pub fn compiled(&self, tokens: usize, texts: usize) -> Result<Arc<Executable>> {
            self.engine.compiled(tokens, texts)
        }
    };
}

pub(super) use engine_methods;
