/* test_ranking.c - a reranker's logits to scores, and documents in the order of their scores. */
#include "frontends/ranking.h"
#include "support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

/* 1 / (1 + e^-x) in long double, rounded to float. exp errs by less than an ulp of double, and the
 * sum and the quotient by half of one: together below 2^-51, before the rounding to float. */
Test(ranking, scores) {
    rng r = {5};
    for (int i = 0; i < 100000; i++) {
        const float x = (float)(rng_uniform(&r) * (i % 3 ? 20 : 90));
        const long double want = 1 / (1 + expl(-(long double)x));
        const float got = ranking_score(x);
        cr_assert(got >= 0 && got <= 1);
        cr_assert_not(far_off((double)got, (double)want, (double)want * (U + 0x1p-51) + 0x1p-149),
                      "%g: %g", (double)x, (double)got);
    }
    cr_assert_eq(ranking_score(0), 0.5f);
    cr_assert_eq(ranking_score(-0.0f), 0.5f);
    cr_assert_eq(ranking_score(1e30f), 1);
    cr_assert_eq(ranking_score(-1e30f), 0); /* exp overflows to infinity */
}

Test(ranking, a_larger_logit_has_no_smaller_score) {
    float last = 0;
    for (float x = -110; x < 40; x += 0x1p-6f) {
        cr_assert_geq(ranking_score(x), last, "%g", (double)x);
        last = ranking_score(x);
    }
}

static void check_order(const ranked *r, size_t n) {
    for (size_t i = 1; i < n; i++)
        cr_assert(r[i - 1].logit > r[i].logit ||
                  (r[i - 1].logit == r[i].logit && r[i - 1].index < r[i].index));
}

/* Few different scores: most are ties. */
Test(ranking, sorts_by_logit_then_by_index) {
    enum { N = 300 };
    rng r = {6};
    for (size_t n = 0; n <= N; n += 1 + n / 7) {
        ranked list[N];
        char there[N] = {0};
        for (size_t i = 0; i < n; i++) list[i] = (ranked){i, (float)(rng_u64(&r) % 4) / 4};
        for (size_t i = n; i > 1; i--) { /* qsort does not get them in the order of index */
            const size_t k = rng_u64(&r) % i;
            const ranked was = list[k];
            list[k] = list[i - 1], list[i - 1] = was;
        }
        ranking_sort(list, n);
        check_order(list, n);
        for (size_t i = 0; i < n; i++) there[list[i].index]++;
        for (size_t i = 0; i < n; i++) cr_assert_eq(there[i], 1);
    }
}

/* Their scores are the same float. */
Test(ranking, large_logits_keep_their_order) {
    ranked list[] = {{0, 18}, {1, 20}, {2, 19}, {3, 20}};
    cr_assert(ranking_score(18) == 1 && ranking_score(20) == 1);
    ranking_sort(list, 4);
    const size_t want[] = {1, 3, 2, 0};
    for (size_t i = 0; i < 4; i++) cr_assert_eq(list[i].index, want[i]);
}

Test(ranking, zeros_of_both_signs_are_equal) {
    ranked list[] = {{1, 0.0f}, {0, -0.0f}, {2, 0.5f}};
    ranking_sort(list, 3);
    cr_assert(list[0].index == 2 && list[1].index == 0 && list[2].index == 1);
}
