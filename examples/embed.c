/* embed.c - vectors from C: prints how well each document answers a query.
 *
 *   cc embed.c $(pkg-config --cflags --libs qemb) -o embed
 *   ./embed model.qemb "capital of China" "Beijing is a city." "Gravity attracts bodies."
 */
#include <qemb.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const qemb_err *err) {
    fprintf(stderr, "embed: %s\n", err->msg);
    exit(1);
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: embed MODEL.qemb QUERY DOCUMENT...\n");
        return 1;
    }
    qemb_embedder *e;
    qemb_err err;
    if (qemb_embedder_open(&e, argv[1], NULL, NULL, &err)) die(&err);

    const int dim = qemb_embedder_dim(e);
    float *query = (float *)malloc(2 * (size_t)dim * sizeof *query), *document = query + dim;
    if (!query) {
        fprintf(stderr, "embed: out of memory\n");
        return 1;
    }
    const char *prompt = qemb_embedder_prompt(e, "query");
    if (qemb_embed_text(e, prompt, argv[2], strlen(argv[2]), query, dim, &err)) die(&err);
    prompt = qemb_embedder_prompt(e, "document"); /* most models: "" or NULL, none */

    for (int i = 3; i < argc; i++) {
        if (qemb_embed_text(e, prompt, argv[i], strlen(argv[i]), document, dim, &err)) die(&err);
        double cosine = 0; /* both vectors have length 1 */
        for (int d = 0; d < dim; d++) cosine += (double)query[d] * document[d];
        printf("%.4f  %s\n", cosine, argv[i]);
    }
    free(query);
    qemb_embedder_close(e);
}
