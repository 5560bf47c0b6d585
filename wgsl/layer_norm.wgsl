// `lanes` invocations per row, `size / lanes` rows per workgroup. Each takes mean and variance of its own columns, in registers; one
// reduction makes them those of the row.
{# Inside: row is at most the last one, columns are clamped to used - 1 or below used, those finished below width. stats has three rows of its
   stride. #}
{% if blocks == 1 %}
// An invocation holds its {{ held }} vec4s of the row in registers: x is read once.
{% else %}
// The row is read twice, in {{ blocks }} blocks of {{ held }} vec4s per invocation.
{% endif %}
{% include "shared/group" %}
{% include "shared/moments" %}
{% set round = held * lanes %}
{% set rounds = cols // 4 // round if blocks > 1 else 0 %}
{# Loads `count` vec4s per invocation, the first from column `begin` = base + lane: number of their columns, mean of the differences to
   `shift`, which may be the first of them, sum of squares around it. Of whole rounds no column needs a mask, nor of vec4s that are
   inside the row for every lane. #}
{% macro block(begin, base, count, whole_round, own) %}
{% for h in range(count) %}
    let col{{ h }} = {{ begin }} + {{ h * lanes }}u;
    let x{{ h }} = x_load(row * x_stride + {% if whole_round or base + (h + 1) * lanes <= used %}col{{ h }}{% else %}min(col{{ h }}, {{ used - 1 }}u){% endif %});
{% endfor %}
{% if own %}
    let shift = x0.x;
{% endif %}
    var n = 0.0;
    var sum = vec4<f32>();
{% for h in range(count) %}
{% if whole_round or 4 * (base + (h + 1) * lanes) <= cols %}
    let d{{ h }} = x{{ h }} - shift;
    n += 4.0;
{% else %}
    let w{{ h }} = carried(col{{ h }});
    let d{{ h }} = w{{ h }} * (x{{ h }} - shift);
    n += across(w{{ h }});
{% endif %}
    sum += d{{ h }};
{% endfor %}
    let mean = across(sum) / max(n, 1.0);
    var square = vec4<f32>();
{% for h in range(count) %}
    {
        let e = d{{ h }} - {% if not (whole_round or 4 * (base + (h + 1) * lanes) <= cols) %}w{{ h }} * {% endif %}mean;
        square += e * e;
    }
{% endfor %}
    let squares = across(square);
{% endmacro %}
{% if blocks > 1 %}
// Moments of two parts together, relative to the same element.
fn join(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let away = b.y - a.y;
    let share = b.w / max(a.w + b.w, 1.0);
    return vec4<f32>(a.x, a.y + away * share, a.z + b.z + away * away * a.w * share, a.w + b.w);
}
{# Four parts take turns in joining a block, so that fewer terms are added to one. #}
{% macro join_block() %}
        let joined = join(part0, vec4<f32>(shift, mean, squares, n));
        part0 = part1;
        part1 = part2;
        part2 = part3;
        part3 = joined;
{% endmacro %}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
{% if blocks == 1 %}
{{ block("lane", 0, held, false, true) }}
    let part = vec4<f32>(shift, mean, squares, n);
{% else %}
    let shift = x_load(row * x_stride + min(lane, {{ used - 1 }}u)).x;
{% for p in range(4) %}
    var part{{ p }} = vec4<f32>(shift, 0.0, 0.0, 0.0);
{% endfor %}
    for (var begin = lane; begin < {{ rounds * round }}u; begin += {{ round }}u) {
{{ block("begin", 0, held, true, false) }}
{{ join_block() }}
    }
{% if cols > 4 * rounds * round %}
    {
        let begin = {{ rounds * round }}u + lane;
{{ block("begin", rounds * round, (used - rounds * round + lanes - 1) // lanes, false, false) }}
{{ join_block() }}
    }
{% endif %}
    let part = join(join(part0, part1), join(part2, part3));
{% endif %}
    let moments = row_moments(part, lid);
    let first = moments.x;
    let off = moments.y;
    let rstd = inverseSqrt(moments.z * {{ 1.0 / cols }} + {{ eps }});
    if (wanted >= {{ rows }}u) {
        return;
    }
{% if blocks == 1 %}
{% for h in range(held) %}
{% if (h + 1) * lanes > used %}
    if (col{{ h }} < {{ width }}u) {
        let at = min(col{{ h }}, {{ used - 1 }}u);
        finish(row, col{{ h }}, ((x{{ h }} - first) - off) * rstd * gamma_load(at) + beta_load(at));
    }
{% else %}
    finish(row, col{{ h }}, ((x{{ h }} - first) - off) * rstd * gamma_load(col{{ h }}) + beta_load(col{{ h }}));
{% endif %}
{% endfor %}
{% else %}
    for (var col = lane; col < {{ width }}u; col += {{ lanes }}u) {
        var y = vec4<f32>();
        if (col < {{ used }}u) {
            y = ((x_load(row * x_stride + col) - first) - off) * rstd * gamma_load(col) + beta_load(col);
        }
        finish(row, col, y);
    }
{% endif %}
    if (lane == 0u) {
        stats_put(row, first);
        stats_put(stats_stride + row, off);
        stats_put(2u * stats_stride + row, rstd);
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < stats_stride; i++) {
                stats_put(i, 0.0);
                stats_put(stats_stride + i, 0.0);
                stats_put(2u * stats_stride + i, 0.0);
            }
        }
    }
}
